//! A run's secret: 32 bytes from which everything follows that its coordinators must have in common.
//!
//! A coordinator that takes over has the same secret, by file (mode 0600) or environment, and so the same authority, whose
//! certificates the workers hold, and the same join secret. What is derived also depends on the run and on the attempt at
//! it: with another recipe, or another step to start from, the same secret makes another authority, and workers of one
//! attempt are strangers to the other.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::authority::{Authority, IdentityError};
use super::private;

/// Its length.
const BYTES: usize = 32;
/// No secret's text is longer.
const TEXT_BYTES_MAX: u64 = 256;

/// A run's secret.
#[derive(Clone, PartialEq, Eq)]
pub struct RunSecret([u8; BYTES]);

impl fmt::Debug for RunSecret {
    /// Without itself.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RunSecret")
    }
}

/// Why a secret cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// The file cannot be read or written.
    #[error("cannot {action} the run's secret {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The text is no secret.
    #[error("a run's secret is {} hexadecimal digits, as of `openssl rand -hex {BYTES}`; this is none", 2 * BYTES)]
    Malformed,
}

impl RunSecret {
    /// A new one.
    ///
    /// # Errors
    /// Where the system has no randomness.
    pub fn draw() -> Result<Self, rustls::Error> {
        let mut bytes = [0; BYTES];
        let provider = rustls::crypto::ring::default_provider();
        provider.secure_random.fill(&mut bytes).map_err(|_| rustls::Error::FailedToGetRandomBytes)?;
        Ok(Self(bytes))
    }

    /// Reads a secret's text.
    ///
    /// # Errors
    /// [`SecretError::Malformed`].
    pub fn parse(text: &str) -> Result<Self, SecretError> {
        let mut bytes = [0; BYTES];
        hex::decode_to_slice(text.trim(), &mut bytes).map_err(|_| SecretError::Malformed)?;
        Ok(Self(bytes))
    }

    /// Reads a secret's file; nothing where there is none.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn read(path: &Path) -> Result<Option<Self>, SecretError> {
        match private::read(path, TEXT_BYTES_MAX) {
            Ok(Some(text)) => Self::parse(&text).map(Some),
            Ok(None) => Err(SecretError::Malformed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(SecretError::Io { action: "read", path: path.to_owned(), source }),
        }
    }

    /// Writes a file that only its owner can read.
    ///
    /// # Errors
    /// [`SecretError::Io`].
    pub fn write(&self, path: &Path) -> Result<(), SecretError> {
        let failed = |source| SecretError::Io { action: "write", path: path.to_owned(), source };
        private::write(path, &hex::encode(self.0)).map_err(failed)
    }

    /// An id for a run that was given none: tells nothing of the secret, and is the same for all that have it.
    pub fn public_id(&self) -> String {
        hex::encode(&self.derive("mattock 2026 run id", "", "")[..8])
    }

    /// The authority of an attempt at a run.
    pub(crate) fn authority(&self, run: &str, attempt: &str) -> Result<Authority, IdentityError> {
        Authority::from_seed(run, &self.derive("mattock 2026 run authority", run, attempt))
    }

    /// What lets workers in.
    pub(crate) fn join_secret(&self, run: &str, attempt: &str) -> [u8; BYTES] {
        self.derive("mattock 2026 join secret", run, attempt)
    }

    /// Under which a successor can say, to whoever still speaks to the one before, that it is no more.
    pub(crate) fn reset_key(&self, run: &str, attempt: &str) -> [u8; BYTES] {
        self.derive("mattock 2026 connection reset", run, attempt)
    }

    fn derive(&self, purpose: &str, run: &str, attempt: &str) -> [u8; BYTES] {
        let mut hasher = blake3::Hasher::new_derive_key(purpose);
        hasher.update(&self.0);
        for text in [run, attempt] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn one_secret_is_one_authority_for_one_attempt_at_one_run() {
        let secret = RunSecret::parse(&"7f".repeat(BYTES)).unwrap();
        let certificate = |run, attempt| secret.authority(run, attempt).unwrap().certificate().to_vec();
        assert_eq!(certificate("run", "first"), certificate("run", "first"));
        for (run, attempt) in [("run", "second"), ("other", "first"), ("ru", "nfirst")] {
            assert_ne!(certificate("run", "first"), certificate(run, attempt));
            assert_ne!(secret.join_secret("run", "first"), secret.join_secret(run, attempt));
        }
        assert_ne!(secret.join_secret("run", "first"), secret.reset_key("run", "first"));
        let other = RunSecret::draw().unwrap();
        assert_ne!(certificate("run", "first"), other.authority("run", "first").unwrap().certificate());
    }

    #[test]
    fn a_secret_comes_back_from_its_file_which_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        assert_eq!(RunSecret::read(&path).unwrap(), None);
        let secret = RunSecret::draw().unwrap();
        secret.write(&path).unwrap();
        assert_eq!(RunSecret::read(&path).unwrap(), Some(secret.clone()));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = hex::encode(secret.0);
        assert!(!format!("{secret:?}").contains(&text[..8]));
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in ["", "7f", &"7g".repeat(BYTES), &"7f".repeat(BYTES + 1)] {
            assert!(RunSecret::parse(text).is_err(), "{text:?}");
        }
        assert!(RunSecret::read(Path::new("/dev/zero")).is_err());
    }
}
