"""Problems: read from files, put into prompts, ordered; the embedded tasks."""
