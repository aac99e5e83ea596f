"""The making of a job: its rows and settings, its price, and its submission."""
