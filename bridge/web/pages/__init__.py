"""The pages: one module each. What a page shows is gathered here; how it looks is in its template."""
