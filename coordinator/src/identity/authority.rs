//! The run's certificate authority.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519,
};
use rustls::pki_types::PrivatePkcs8KeyDer;

use super::{COORDINATOR_NAME, Identity};
use crate::ids::WorkerId;

/// What comes before the seed of an Ed25519 key in PKCS #8 (RFC 8410, section 7).
const ED25519_PKCS8: &[u8] =
    &[0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a certificate: {0}")]
pub struct IdentityError(#[from] rcgen::Error);

/// A run's certificate authority, in memory.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Vec<u8>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    /// A new authority for the run of this id.
    ///
    /// # Errors
    /// Where the system has no randomness.
    pub fn new(run: &str) -> Result<Self, IdentityError> {
        Self::with_key(run, KeyPair::generate()?)
    }

    /// The one authority of this run and seed: key, serial number and signature all follow from them.
    pub(super) fn from_seed(run: &str, seed: &[u8; 32]) -> Result<Self, IdentityError> {
        let key = PrivatePkcs8KeyDer::from([ED25519_PKCS8, &seed[..]].concat());
        Self::with_key(run, KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ED25519)?)
    }

    fn with_key(run: &str, key: KeyPair) -> Result<Self, IdentityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("mattock run {run}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key)?.der().to_vec();
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// The coordinator's own identity.
    ///
    /// # Errors
    /// Where the system has no randomness.
    pub fn coordinator(&self) -> Result<Identity, IdentityError> {
        let key = KeyPair::generate()?;
        let certificate = leaf(COORDINATOR_NAME)?.signed_by(&key, &self.issuer)?.der().to_vec();
        let name = COORDINATOR_NAME.to_owned();
        Ok(Identity { name, certificate, key: key.serialize_der(), authority: self.certificate.clone() })
    }

    /// A certificate for a worker's key. Of the request only the key is taken.
    ///
    /// # Errors
    /// Where the request is malformed or not signed by its key.
    pub fn sign(&self, worker: WorkerId, request: &[u8]) -> Result<Vec<u8>, IdentityError> {
        let mut request = CertificateSigningRequestParams::from_der(&request.to_vec().into())?;
        request.params = leaf(&worker.dns_name())?;
        Ok(request.signed_by(&self.issuer)?.der().to_vec())
    }
}

fn leaf(name: &str) -> Result<CertificateParams, IdentityError> {
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

/// A worker's key, and its request for a certificate.
pub struct Request {
    key: KeyPair,
    der: Vec<u8>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").finish_non_exhaustive()
    }
}

impl Request {
    /// A new key.
    ///
    /// # Errors
    /// Where the system has no randomness.
    pub fn new() -> Result<Self, IdentityError> {
        let key = KeyPair::generate()?;
        let der = CertificateParams::default().serialize_request(&key)?.der().to_vec();
        Ok(Self { key, der })
    }

    /// The request, DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The identity, once the certificate is there.
    pub fn into_identity(self, worker: WorkerId, certificate: Vec<u8>, authority: Vec<u8>) -> Identity {
        Identity { name: worker.dns_name(), certificate, key: self.key.serialize_der(), authority }
    }
}
