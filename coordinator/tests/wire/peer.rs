//! Peers that speak QUIC by hand, so that they may say what no client says.

use std::sync::Arc;

use mattock_coordinator::Client;
use mattock_coordinator::identity::{CONTROL_ALPN, ENROLL_ALPN, Identity, JoinToken, client_config};
use mattock_coordinator::wire;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use tokio::time::timeout;

use crate::run::{LONG, PATIENT};

/// A field of a token that is hers alone, in bytes.
fn field(token: &JoinToken, name: &str) -> Vec<u8> {
    let token: serde_json::Value = serde_json::from_str(&token.to_string()).unwrap();
    hex::decode(token[name].as_str().unwrap()).unwrap()
}

pub fn authority(token: &JoinToken) -> Vec<u8> {
    field(token, "authority")
}

pub fn secret(token: &JoinToken) -> Vec<u8> {
    field(token, "secret")
}

/// A token with another field.
pub fn with_field(token: &JoinToken, name: &str, value: &str) -> JoinToken {
    let mut fields: serde_json::Value = serde_json::from_str(&token.to_string()).unwrap();
    assert!(fields[name].is_string());
    fields[name] = value.into();
    JoinToken::parse(&fields.to_string()).unwrap()
}

/// What a caller without a certificate speaks.
pub fn anonymous(token: &JoinToken, alpn: &[u8]) -> ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority(token).into()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![alpn.to_vec()];
    ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()))
}

/// What somebody with a certificate speaks.
pub fn member(identity: &Identity) -> ClientConfig {
    client_config(identity, LONG).unwrap()
}

/// A certificate of this run's authority, by the front door.
pub fn certificate(token: &JoinToken) -> Identity {
    Client::enroll(token, LONG).unwrap().identity().clone()
}

/// A connection; the endpoint goes with it.
pub struct Peer {
    pub connection: Connection,
    _endpoint: Endpoint,
}

impl Peer {
    pub async fn dial(token: &JoinToken, config: ClientConfig) -> Result<Self, ConnectionError> {
        let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
        let connecting = endpoint.connect_with(config, token.address, "coordinator.mattock").unwrap();
        let connection = timeout(PATIENT, connecting).await.unwrap()?;
        Ok(Self { connection, _endpoint: endpoint })
    }

    pub async fn stranger(token: &JoinToken) -> Self {
        Self::dial(token, anonymous(token, ENROLL_ALPN)).await.unwrap()
    }

    pub async fn with_certificate(token: &JoinToken, identity: &Identity) -> Self {
        Self::dial(token, member(identity)).await.unwrap()
    }

    /// Says these bytes on a stream of its own, and nothing more.
    pub async fn say(&self, bytes: &[u8]) -> (SendStream, RecvStream) {
        let (mut send, receive) = self.connection.open_bi().await.unwrap();
        // Whoever is turned away meanwhile need not finish.
        let _ = send.write_all(bytes).await;
        (send, receive)
    }

    /// Says these bytes and ends the stream; the answer, if there is one.
    pub async fn ask(&self, bytes: &[u8]) -> Answer {
        // Whoever is turned away on sight may be so before a word is said.
        let Ok((mut send, receive)) = self.connection.open_bi().await else {
            return Answer::Closed(self.closed().await);
        };
        let _ = send.write_all(bytes).await;
        let _ = send.finish();
        self.answer(receive).await
    }

    /// Says these bytes and might say more, as a worker that waits for its answer; the answer, if there is one.
    pub async fn greet(&self, bytes: &[u8]) -> Answer {
        let (_open, receive) = self.say(bytes).await;
        self.answer(receive).await
    }

    async fn answer(&self, mut receive: RecvStream) -> Answer {
        let mut header = [0; wire::HEADER_BYTES];
        let read = async {
            receive.read_exact(&mut header).await.ok()?;
            let mut archive = vec![0; wire::decode_header(header).ok()?];
            receive.read_exact(&mut archive).await.ok()?;
            Some(archive)
        };
        match timeout(PATIENT, read).await.expect("the coordinator neither answers nor hangs up") {
            Some(archive) => Answer::Message(archive),
            None => Answer::Closed(self.closed().await),
        }
    }

    /// Why the coordinator hung up.
    pub async fn closed(&self) -> String {
        let closed = timeout(PATIENT, self.connection.closed()).await;
        match closed.expect("the coordinator does not hang up") {
            ConnectionError::ApplicationClosed(close) => String::from_utf8(close.reason.to_vec()).unwrap(),
            other => other.to_string(),
        }
    }
}

/// What comes back.
#[derive(Debug)]
pub enum Answer {
    /// An archive.
    Message(Vec<u8>),
    /// The coordinator hung up, for this reason.
    Closed(String),
}

impl Answer {
    /// The reason of one who was hung up on.
    pub fn closed(self) -> String {
        match self {
            Self::Closed(reason) => reason,
            Self::Message(archive) => panic!("an answer of {} bytes instead of a refusal", archive.len()),
        }
    }
}

pub fn control_alpn(version: u8) -> Vec<u8> {
    [&CONTROL_ALPN[..CONTROL_ALPN.len() - 1], &[b'0' + version]].concat()
}
