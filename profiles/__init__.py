"""What a board is and what a fleet is made of: YAML data, one schema, one loader.

Knows no device, no server and no wire: it imports nothing else of this project.
What varies between two boards of a kind is measured on the device, not written here.
"""
