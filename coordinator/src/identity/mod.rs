//! Who is who: a run's own certificate authority, join tokens, and certificates.
//!
//! The authority follows from the run's secret, and lives in the coordinator's memory alone. A worker makes its own key,
//! shows the token's secret, and gets a certificate that names its id; from then on both sides speak mutual TLS 1.3.
//! A peer of another run has another authority and is refused in the handshake. A coordinator that takes over has the same
//! secret, and so the same authority.

mod authority;
mod private;
mod secret;
mod tls;
mod token;

pub use self::authority::{Authority, IdentityError, Request};
pub use self::secret::{RunSecret, SecretError};
pub use self::tls::{client_config, enroll_config, peer_name, server_config};
pub use self::token::{JoinToken, TokenError};

/// ALPN of admitted workers.
pub const CONTROL_ALPN: &[u8] = b"mattock-control/3";
/// ALPN of those who ask for a certificate.
pub const ENROLL_ALPN: &[u8] = b"mattock-enroll/3";
/// The coordinator's DNS name in its certificate.
pub const COORDINATOR_NAME: &str = "coordinator.mattock";

/// A certificate with its key, and the authority it is from; all DER.
#[derive(Clone)]
pub struct Identity {
    /// DNS name in the certificate.
    pub name: String,
    /// The certificate.
    pub certificate: Vec<u8>,
    /// Its key, PKCS #8.
    pub key: Vec<u8>,
    /// The run's authority.
    pub authority: Vec<u8>,
}

impl std::fmt::Debug for Identity {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("name", &self.name).finish_non_exhaustive()
    }
}
