"""The papers' methods, one file each. Empty until the first method lands: see the README, "Add a system"."""
