"""Stories: what an application does, and what the daemon, a process of its own, makes of it."""
