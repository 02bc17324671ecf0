"""Ray Train shells around model/."""
