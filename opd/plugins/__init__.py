"""Parts of this framework for other frameworks' hooks."""
