"""The optimal-mixing sampler: text from a geometric mixture of a student and a teacher, and files made of it."""
