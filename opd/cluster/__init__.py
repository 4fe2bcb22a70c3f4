"""Where a run's processes live: all in this one, or placed, watched and stopped by Ray. Only ``ray_*`` imports ray."""
