"""Which token counts meet a budget? One search for each scope; they know sites and costs, and no model."""
