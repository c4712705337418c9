"""Bridges to other libraries. Each is imported only when that library is in use."""
