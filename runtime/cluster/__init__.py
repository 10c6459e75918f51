"""Prefill and decode as processes of their own, and the router in front of them."""
