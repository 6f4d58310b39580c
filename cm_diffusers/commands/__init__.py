"""What `cm-diffusers` can do, a module for each group of commands. Importing them costs nothing."""
