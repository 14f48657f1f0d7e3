"""How does it leave the house?"""
