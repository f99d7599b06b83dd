"""Where rows are compared: torch (eager), and what it needs."""
