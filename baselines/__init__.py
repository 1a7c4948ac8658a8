"""The systems that the methods are compared with: one file each, upstream adapters and native re-statements."""
