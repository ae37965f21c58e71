"""What each command of the command line does: one module a group of commands, one function a command."""
