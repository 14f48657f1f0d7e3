"""How do N tokens become P? The mathematics; it knows no model."""
