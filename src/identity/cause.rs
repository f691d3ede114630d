//! Why a credential does not hold, in words of a closed set: metric labels and the audit's `error`, never the client's
//! reply, which has one wording for all of them (contract, section 5).

/// No credential at all: [`Rejection::Missing`](super::Rejection::Missing).
pub const MISSING: &str = "missing";
/// `Authorization` or `x-api-key` is there twice.
pub const REPEATED_CREDENTIAL: &str = "repeated_credential";
/// `Authorization` and `x-api-key` carry different credentials.
pub const CONFLICTING_CREDENTIALS: &str = "conflicting_credentials";
/// `Authorization` with a scheme other than Bearer, and no signature of a device either.
pub const NOT_BEARER: &str = "not_bearer";
/// Longer than [`MAX_TOKEN_BYTES`](super::credential::MAX_TOKEN_BYTES).
pub const OVERSIZED: &str = "oversized";
/// Not three segments of canonical base64url with JSON objects in the first two; or a device's key or signature that is none.
pub const MALFORMED: &str = "malformed";
/// A member is there twice, in the header or in the claims.
pub const DUPLICATE_MEMBER: &str = "duplicate_member";
/// A header member that would change what the token means or which key is used: `crit`, `b64`, `jwk`, `jku`, `x5u`,
/// `x5c`, ...
pub const UNSUPPORTED_HEADER: &str = "unsupported_header";
/// `alg` is not the algorithm of the key; `none` is one of these.
pub const WRONG_ALGORITHM: &str = "wrong_algorithm";
/// `kid` names no key of ours.
pub const UNKNOWN_KEY: &str = "unknown_key";
/// The key set's URL has not answered yet, so that no token can be judged: the one cause that is not the token's.
pub const NO_KEYS: &str = "no_keys";
pub const BAD_SIGNATURE: &str = "bad_signature";
/// `exp` or `iss` is missing.
pub const MISSING_CLAIM: &str = "missing_claim";
/// A claim of the wrong type, too long, or with control characters.
pub const BAD_CLAIM: &str = "bad_claim";
pub const EXPIRED: &str = "expired";
/// `nbf` lies in the future.
pub const NOT_YET_VALID: &str = "not_yet_valid";
pub const WRONG_ISSUER: &str = "wrong_issuer";
/// `aud` is missing or another's; or it is there and this proxy has no audience.
pub const WRONG_AUDIENCE: &str = "wrong_audience";
/// Without `sub`, `jti`, and `roles` or `permissions`: an administrator's token, signed by the same key.
pub const NOT_AN_AGENT: &str = "not_an_agent";
pub const TOO_MANY_ROLES: &str = "too_many_roles";
/// A device's key that belongs to no agent.
pub const UNKNOWN_DEVICE: &str = "unknown_device";
/// A device's signature without `ts`, with two, or with one that is no time.
pub const BAD_TIMESTAMP: &str = "bad_timestamp";
/// A device's `ts` lies too far from our clock; one of the two is wrong, or somebody sends an old request again.
pub const STALE_TIMESTAMP: &str = "stale_timestamp";
/// An API key, and this proxy takes none.
pub const API_KEYS_OFF: &str = "api_keys_off";
/// An API key that belongs to no agent.
pub const UNKNOWN_API_KEY: &str = "unknown_api_key";
/// A good key of an agent that is suspended.
pub const SUSPENDED: &str = "suspended";

/// Every cause, for the metric that counts them.
pub const CAUSES: &[&str] = &[
    MISSING,
    REPEATED_CREDENTIAL,
    CONFLICTING_CREDENTIALS,
    NOT_BEARER,
    OVERSIZED,
    MALFORMED,
    DUPLICATE_MEMBER,
    UNSUPPORTED_HEADER,
    WRONG_ALGORITHM,
    UNKNOWN_KEY,
    NO_KEYS,
    BAD_SIGNATURE,
    MISSING_CLAIM,
    BAD_CLAIM,
    EXPIRED,
    NOT_YET_VALID,
    WRONG_ISSUER,
    WRONG_AUDIENCE,
    NOT_AN_AGENT,
    TOO_MANY_ROLES,
    UNKNOWN_DEVICE,
    BAD_TIMESTAMP,
    STALE_TIMESTAMP,
    API_KEYS_OFF,
    UNKNOWN_API_KEY,
    SUSPENDED,
];
