"""Makes `wattbridge web` keep no more than two pages live."""

from bridge.web import site

site.MOST_STREAMS = 2
