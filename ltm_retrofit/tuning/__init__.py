"""How does it get good again?"""
