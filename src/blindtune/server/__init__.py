"""The provider's side: hosts frozen models, and computes forward and backward passes for its tenants' adapters."""

from blindtune.extras import requires

with requires("server", "The server"):
    from blindtune.server.app import create_app
    from blindtune.server.auth import TokenStore, add_token
    from blindtune.server.host import ServerSettings
    from blindtune.server.run import Address, check_exposure, serve

__all__ = ["Address", "ServerSettings", "TokenStore", "add_token", "check_exposure", "create_app", "serve"]
