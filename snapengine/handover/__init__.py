"""How a peer hands over its memory: messages, connection, listener, and the checks of what it offers."""
