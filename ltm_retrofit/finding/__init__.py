"""Where does this model attend, and where may it be cut? This wing looks and proves; it changes nothing."""
