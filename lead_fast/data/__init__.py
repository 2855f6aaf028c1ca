"""Problems: reading them from files, turning them into prompts, ordering them; the embedded tasks."""
