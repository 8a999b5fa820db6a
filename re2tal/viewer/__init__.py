"""A local page that shows videos beside predicted and true actions, and saves corrections as annotations."""
