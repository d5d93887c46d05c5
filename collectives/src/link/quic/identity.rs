//! Who a node is and whom it believes: certificates of one authority, with one DNS name each.
//!
//! A peer must prove a certificate of the run's authority that names exactly the neighbour that is expected, on both
//! ends of a connection. There is no session resumption: every link proves itself anew.

use std::fmt;
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig, version::TLS13};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The protocol's name within TLS.
const ALPN: &[u8] = b"mattock-data/1";

/// A node's certificate and key, and the authority that must have signed everybody's. All DER.
#[derive(Clone)]
pub struct Identity {
    /// The node's certificate, then those between it and the authority, if any.
    pub certificates: Vec<Vec<u8>>,
    /// The certificate's private key: PKCS#8, SEC1 or PKCS#1.
    pub private_key: Vec<u8>,
    /// The authority's certificate.
    pub root: Vec<u8>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name();
        f.debug_struct("Identity").field("name", &name).finish_non_exhaustive()
    }
}

/// Why certificates cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// There is no certificate, or it cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// A certificate must name one DNS name and nothing else.
    #[error("the certificate must name exactly one DNS name, but names {0}")]
    Names(String),
    /// The private key cannot be read.
    #[error("the private key cannot be read: {0}")]
    Key(&'static str),
    /// Certificate, key and root do not fit together.
    #[error("certificate, key and authority cannot be used for TLS: {0}")]
    Tls(String),
}

impl Identity {
    /// The DNS name that the node's certificate names.
    ///
    /// # Errors
    /// If there is none, or more than one name.
    pub fn name(&self) -> Result<String, IdentityError> {
        let leaf = self.certificates.first();
        certificate_name(leaf.ok_or_else(|| IdentityError::Unreadable("there is none".into()))?)
    }

    pub(crate) fn client_config(&self) -> Result<QuicClientConfig, IdentityError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(tls)?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.chain(), self.key()?)
            .map_err(tls)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        QuicClientConfig::try_from(config).map_err(tls)
    }

    pub(crate) fn server_config(&self) -> Result<QuicServerConfig, IdentityError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?.into(), provider());
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier.build().map_err(tls)?)
            .with_single_cert(self.chain(), self.key()?)
            .map_err(tls)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        QuicServerConfig::try_from(config).map_err(tls)
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.certificates.iter().cloned().map(CertificateDer::from).collect()
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, IdentityError> {
        PrivateKeyDer::try_from(self.private_key.clone()).map_err(IdentityError::Key)
    }

    fn roots(&self) -> Result<RootCertStore, IdentityError> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(self.root.clone())).map_err(tls)?;
        Ok(roots)
    }
}

fn tls(error: impl fmt::Display) -> IdentityError {
    IdentityError::Tls(error.to_string())
}

/// *ring*'s cryptography, passed explicitly: a process-wide default may be another's. AES-128-GCM first.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = default_provider();
    provider.cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
    ];
    Arc::new(provider)
}

/// The name in the certificate that the other end of a connection has proved.
pub(crate) fn peer_name(connection: &quinn::Connection) -> Result<String, IdentityError> {
    let proved =
        connection.peer_identity().and_then(|proved| proved.downcast::<Vec<CertificateDer<'static>>>().ok());
    let chain = proved.ok_or_else(|| IdentityError::Unreadable("the peer has shown none".into()))?;
    let leaf = chain.first().ok_or_else(|| IdentityError::Unreadable("the peer's chain is empty".into()))?;
    certificate_name(leaf)
}

fn certificate_name(der: &[u8]) -> Result<String, IdentityError> {
    let unreadable = |error: &dyn fmt::Display| IdentityError::Unreadable(error.to_string());
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| unreadable(&error))?;
    let extension = certificate.subject_alternative_name().map_err(|error| unreadable(&error))?;
    let names = extension.map_or(&[][..], |extension| &extension.value.general_names);
    match names {
        [GeneralName::DNSName(name)] => Ok((*name).to_owned()),
        names => Err(IdentityError::Names(format!("{names:?}"))),
    }
}
