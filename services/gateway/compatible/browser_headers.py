"""Headers that vendors' JavaScript SDKs send from a browser, and those that pages may read of the answers."""

REQUEST_HEADERS = (
    "xi-api-key",
    "User-Agent",  # which Firefox and Safari let them set
    "X-Fern-Language",
    "X-Fern-Runtime",
    "X-Fern-Runtime-Version",
    "X-Fern-SDK-Name",
    "X-Fern-SDK-Version",
    "X-Stainless-Arch",
    "X-Stainless-Helper-Method",
    "X-Stainless-Lang",
    "X-Stainless-OS",
    "X-Stainless-Package-Version",
    "X-Stainless-Retry-Count",
    "X-Stainless-Runtime",
    "X-Stainless-Runtime-Version",
    "X-Stainless-Timeout",
)
RESPONSE_HEADERS = ("X-Request-ID", "X-Should-Retry", "song-id", "HeartMuLa-Notes")
