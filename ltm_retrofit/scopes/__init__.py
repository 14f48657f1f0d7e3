"""How is a module changed? Its ``forward`` is intercepted on the instance; its class and its keys stay."""
