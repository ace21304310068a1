"""The routes of the API, by subject.

| file | routes |
|---|---|
| `models.py` | `GET /v1/models`, `GET /v1/models/{model}`, `…/tokenizer`, `…/parts/{part}` |
| `adapters.py` | `PUT /v1/adapters/{sha256}` |
| `deploy.py` | `PUT /v1/plugins/{sha256}`, `POST /v1/models/{model}/score`, `…/generate` |
| `trunk.py` | `POST /v1/models/{model}/trunk/forward`, `…/trunk/backward` |
| `hidden.py` | `POST /v1/models/{model}/forward`, `…/backward` |
| `health.py` | `GET /healthz`, `GET /readyz`, `GET /metrics` |

Every PUT and POST route has a `Handler` (`handler.py`).
"""

from blindtune.server.routes import adapters, deploy, health, hidden, models, trunk

ROUTERS = (models.router, adapters.router, deploy.router, trunk.router, hidden.router, health.router)
"""The routers, in the order in which paths are matched: a model's name may contain slashes, so `trunk` comes before
`hidden`."""

__all__ = ["ROUTERS"]
