"""The OpenAPI and the AsyncAPI document, and the pages that show them."""
