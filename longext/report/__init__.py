"""Results as tables, pictures, pages and files."""
