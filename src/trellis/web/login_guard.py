"""The login: one owner's password, and tokens for those who have logged in with it."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from http.cookies import CookieError, SimpleCookie

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers

from ..errors import Refused
from ..settings import Settings
from ..store import logins
from ..store.store import Store

LOGIN_COOKIE = "trellis"
LOGIN_DAYS = 30


class LoginGuard:
    """Checks the password and the tokens. Tokens are stored as hashes only."""

    def __init__(self, settings: Settings, store: Store) -> None:
        password = settings.password.get_secret_value()
        self._store = store
        self._hasher = PasswordHasher()
        self._password_hash = self._hasher.hash(password) if password else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._rates = parse("5 per minute"), parse("30 per minute")
        self._login_lock = asyncio.Lock()
        self._login_times: dict[str, float] = {}
        self.logout_events: dict[str, set[asyncio.Event]] = {}

    @property
    def requires_password(self) -> bool:
        """Whether this server requires a password."""
        return self._password_hash is not None

    async def login(self, password: str, client: str) -> str:
        """Return a new token. Raise Refused for a wrong password or too many attempts."""
        async with self._login_lock:  # one at a time: hashing takes 64 MB
            if not all(self._limiter.test(rate, "login", who) for rate, who in self._rate_limits(client)):
                raise Refused("Too many attempts.", code="too_many_tries", next_step="Wait a minute.")
            is_correct = self._password_hash is not None and await asyncio.to_thread(
                self._password_matches, password[:1024]
            )
            if not is_correct:
                for rate, who in self._rate_limits(client):
                    self._limiter.hit(rate, "login", who)
        if not is_correct:
            raise Refused("Wrong password.", code="wrong_password", next_step="Try again.", field="password")
        token = secrets.token_urlsafe(32)
        await self._store.write(logins.add_login, _hash_token(token), time.time())
        return token

    async def is_valid_token(self, token: str) -> bool:
        """Return whether a token is valid."""
        if not token:
            return False
        hashed = _hash_token(token)
        if hashed not in self._login_times:
            created = await self._store.read(logins.login_created, hashed)
            if created is None:
                return False
            self._login_times[hashed] = created
        return time.time() - self._login_times[hashed] < LOGIN_DAYS * 86_400

    async def logout(self, token: str) -> None:
        """End a login, and every stream opened with it."""
        hashed = _hash_token(token)
        await self._store.write(logins.delete_login, hashed)
        self._login_times.pop(hashed, None)
        for logout_event in self.logout_events.pop(hashed, set()):
            logout_event.set()

    def add_logout_event(self, token: str) -> asyncio.Event:
        """Return an event that is set when a login ends."""
        logout_event = asyncio.Event()
        self.logout_events.setdefault(_hash_token(token), set()).add(logout_event)
        return logout_event

    def remove_logout_event(self, token: str, logout_event: asyncio.Event) -> None:
        watchers = self.logout_events.get(_hash_token(token), set())
        watchers.discard(logout_event)
        if not watchers:
            self.logout_events.pop(_hash_token(token), None)

    def _rate_limits(self, client: str) -> list[tuple[RateLimitItem, str]]:
        """Return the limits on wrong passwords: for each client, and for all together."""
        return [(self._rates[0], client), (self._rates[1], "everyone")]

    def _password_matches(self, password: str) -> bool:
        try:
            return self._hasher.verify(self._password_hash or "", password.encode("utf-8", "replace"))
        except VerifyMismatchError:
            return False


def cookie_token(headers: Headers) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookie[LOGIN_COOKIE].value if LOGIN_COOKIE in cookie else ""


def _hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
