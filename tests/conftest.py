"""What every test may ask for."""

import uuid

import pytest


@pytest.fixture
def topic_root() -> str:
    """A topic prefix that no other test uses, without a slash at its end: brokers are shared, and retain."""
    return f"test/{uuid.uuid4().hex}"
