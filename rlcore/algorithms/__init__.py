"""The maths, once: pure torch functions that read like the papers."""
