"""Sequential tests: measuring ends once what was asked is decided, at a stated rate of errors."""
