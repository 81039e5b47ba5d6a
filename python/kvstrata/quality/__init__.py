"""Quality: tasks, peers and the harness that runs policies on them and draws score against bytes."""
