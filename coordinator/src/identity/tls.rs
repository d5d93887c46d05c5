//! TLS 1.3 configurations: mutual for members, one-sided for enrolment.
//!
//! The provider is passed explicitly: nothing here depends on a process-wide default.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, IdleTimeout, ServerConfig, TransportConfig};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{CONTROL_ALPN, ENROLL_ALPN, Identity};

/// Of a control connection: one that goes both ways is all there is.
const STREAMS_MAX: u32 = 1;
/// What may arrive of a stream before it is read: this much memory any peer can take, a thousand of them at once.
const WINDOW_BYTES: u32 = 256 << 10;

/// A connection may be idle for so many timeouts: whether a peer is alive is for those to say who read its messages, and know
/// whether they have looked.
const IDLE: u32 = 4;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(authority: &[u8]) -> Result<Arc<RootCertStore>, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(authority.to_vec()))?;
    Ok(Arc::new(roots))
}

fn certificate(identity: &Identity) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.key.clone()));
    (vec![CertificateDer::from(identity.certificate.clone())], key)
}

fn transport(timeout: Duration) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport.max_concurrent_bidi_streams(STREAMS_MAX.into());
    transport.max_concurrent_uni_streams(0u32.into());
    transport.stream_receive_window(WINDOW_BYTES.into());
    transport.receive_window(WINDOW_BYTES.into());
    transport.datagram_receive_buffer_size(None);
    transport.keep_alive_interval(Some(timeout / 4));
    transport.max_idle_timeout(IdleTimeout::try_from(IDLE * timeout).ok());
    Arc::new(transport)
}

fn general(error: impl std::fmt::Display) -> rustls::Error {
    rustls::Error::General(error.to_string())
}

/// The coordinator's side: members show a certificate, those who enrol do not.
///
/// # Errors
/// Where the identity does not hold together.
pub fn server_config(identity: &Identity, timeout: Duration) -> Result<ServerConfig, rustls::Error> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(&identity.authority)?, provider())
        .allow_unauthenticated()
        .build()
        .map_err(general)?;
    let (chain, key) = certificate(identity);
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    tls.alpn_protocols = vec![CONTROL_ALPN.to_vec(), ENROLL_ALPN.to_vec()];
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).map_err(general)?));
    config.transport_config(transport(timeout));
    Ok(config)
}

/// A member's side.
///
/// # Errors
/// Where the identity does not hold together.
pub fn client_config(identity: &Identity, timeout: Duration) -> Result<ClientConfig, rustls::Error> {
    let (chain, key) = certificate(identity);
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(&identity.authority)?)
        .with_client_auth_cert(chain, key)?;
    quic_client(tls, CONTROL_ALPN, timeout)
}

/// The side of a worker that has only the authority's certificate, from its token.
///
/// # Errors
/// Where the certificate is none.
pub fn enroll_config(authority: &[u8], timeout: Duration) -> Result<ClientConfig, rustls::Error> {
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(authority)?)
        .with_no_client_auth();
    quic_client(tls, ENROLL_ALPN, timeout)
}

fn quic_client(
    mut tls: rustls::ClientConfig,
    alpn: &[u8],
    timeout: Duration,
) -> Result<ClientConfig, rustls::Error> {
    tls.alpn_protocols = vec![alpn.to_vec()];
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(general)?));
    config.transport_config(transport(timeout));
    Ok(config)
}

/// The one DNS name in the certificate of a connection's peer.
pub fn peer_name(connection: &quinn::Connection) -> Option<String> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let (_, certificate) = X509Certificate::from_der(chain.first()?).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    match names.value.general_names.as_slice() {
        [GeneralName::DNSName(name)] => Some((*name).to_owned()),
        _ => None,
    }
}
