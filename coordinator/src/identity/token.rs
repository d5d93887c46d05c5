//! Join tokens: what a worker needs to find a run and be let in.
//!
//! Travels by a file of mode 0600 or the environment, never on a command line. It expires; it is no certificate: its
//! secret is worth a certificate while it is valid.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::private;

/// Version of the token's form.
const FORMAT: u32 = 1;
/// No token is longer.
const TOKEN_BYTES_MAX: u64 = 16 << 10;

/// What a worker needs to find a run and be let in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinToken {
    mattock_token: u32,
    /// The run's id.
    pub run: String,
    /// Where the coordinator listens.
    pub address: SocketAddr,
    /// The authority's certificate, DER, in hex.
    authority: String,
    /// In hex.
    secret: String,
    /// Seconds since 1970 after which it is worth nothing.
    pub expires: u64,
    /// How long the run waits for a silent peer, in milliseconds.
    timeout_ms: u64,
}

impl fmt::Debug for JoinToken {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("run", &self.run)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// Why a token cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The file cannot be read or written.
    #[error("cannot {action} the join token {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The text is no token.
    #[error(
        "this is no join token of this version of Mattock ({0}): copy the file that the coordinator wrote"
    )]
    Malformed(String),
}

impl JoinToken {
    pub(crate) fn new(
        run: &str,
        address: SocketAddr,
        authority: &[u8],
        secret: [u8; 32],
        expires: u64,
        timeout: Duration,
    ) -> Self {
        Self {
            mattock_token: FORMAT,
            run: run.to_owned(),
            address,
            authority: hex::encode(authority),
            secret: hex::encode(secret),
            expires,
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1),
        }
    }

    /// How long the run waits for a silent peer.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// Whether both let workers into one attempt at a run, be it by different coordinators.
    pub fn is_of_same_attempt(&self, other: &Self) -> bool {
        (&self.run, &self.authority, &self.secret) == (&other.run, &other.authority, &other.secret)
    }

    /// Reads a token's text.
    ///
    /// # Errors
    /// [`TokenError::Malformed`].
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let malformed = |reason: String| TokenError::Malformed(reason);
        let token: Self = serde_json::from_str(text.trim()).map_err(|error| malformed(error.to_string()))?;
        if token.mattock_token != FORMAT {
            return Err(malformed(format!("it has version {}", token.mattock_token)));
        }
        for field in [&token.authority, &token.secret] {
            hex::decode(field).map_err(|error| malformed(error.to_string()))?;
        }
        Ok(token)
    }

    /// Reads a token file.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let failed = |source| TokenError::Io { action: "read", path: path.to_owned(), source };
        let text = private::read(path, TOKEN_BYTES_MAX).map_err(failed)?;
        let text = text.ok_or_else(|| TokenError::Malformed("the file is too large".to_owned()))?;
        Self::parse(&text)
    }

    /// Writes a token file that only its owner can read; it appears whole or not at all.
    ///
    /// # Errors
    /// [`TokenError::Io`].
    pub fn write(&self, path: &Path) -> Result<(), TokenError> {
        let failed = |source| TokenError::Io { action: "write", path: path.to_owned(), source };
        private::write(path, &self.to_string()).map_err(failed)
    }

    /// The authority's certificate, DER.
    pub(crate) fn authority(&self) -> Vec<u8> {
        hex::decode(&self.authority).unwrap_or_default()
    }

    pub(crate) fn secret(&self) -> Vec<u8> {
        hex::decode(&self.secret).unwrap_or_default()
    }
}

impl fmt::Display for JoinToken {
    /// The text that [`JoinToken::parse`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    fn token() -> JoinToken {
        JoinToken::new(
            "run",
            "127.0.0.1:4433".parse().unwrap(),
            b"authority",
            [7; 32],
            99,
            Duration::from_secs(3),
        )
    }

    #[test]
    fn a_token_comes_back_from_its_file_which_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        token().write(&path).unwrap();
        assert_eq!(JoinToken::read(&path).unwrap(), token());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    /// Somebody else's file where the token is made must not receive it.
    #[test]
    fn a_link_that_lies_in_wait_gets_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (path, trap) = (folder.path().join("token"), folder.path().join("trap"));
        std::fs::write(&trap, "").unwrap();
        let making = path.with_extension(format!("{}.tmp", std::process::id()));
        std::os::unix::fs::symlink(&trap, &making).unwrap();
        token().write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&trap).unwrap(), "");
        assert_eq!(JoinToken::read(&path).unwrap(), token());
    }

    #[test]
    fn a_file_without_end_is_no_token() {
        assert!(JoinToken::read(Path::new("/dev/zero")).unwrap_err().to_string().contains("too large"));
    }

    #[test]
    fn a_successors_token_is_of_the_same_attempt() {
        let successors = JoinToken { address: "127.0.0.1:9".parse().unwrap(), expires: 100, ..token() };
        assert!(token().is_of_same_attempt(&successors));
        let other = JoinToken { secret: hex::encode([8; 32]), ..token() };
        assert!(!token().is_of_same_attempt(&other));
    }

    #[test]
    fn secrets_are_not_printed_by_accident() {
        assert!(!format!("{:?}", token()).contains("0707"));
    }

    #[test]
    fn another_version_is_refused() {
        let text = token().to_string().replace("\"mattock_token\":1", "\"mattock_token\":2");
        assert!(JoinToken::parse(&text).unwrap_err().to_string().contains("version 2"));
    }

    proptest! {
        #[test]
        fn any_text_is_a_token_or_an_error(text in ".{0,100}") {
            let _ = JoinToken::parse(&text);
        }
    }
}
