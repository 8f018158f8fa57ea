"""Webhooks: payload and signature, allowed addresses, delivery, and the consumer of ended songs."""
