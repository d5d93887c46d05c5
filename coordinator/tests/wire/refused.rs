//! Whoever does not belong to the run is told so, an event says it, and the run goes on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mattock_coordinator::identity::{
    Authority, CONTROL_ALPN, ENROLL_ALPN, Identity, JoinToken, Request, server_config,
};
use mattock_coordinator::protocol::{Enroll, Enrolled, FromCoordinator, FromWorker};
use mattock_coordinator::wire::{self, HEADER_BYTES, MESSAGE_BYTES_MAX};
use mattock_coordinator::{Client, JoinError, WorkerId};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, ServerConfig};
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::peer::{
    Answer, Peer, anonymous, authority, certificate, control_alpn, member, secret, with_field,
};
use crate::relay::Dice;
use crate::run::{LONG, PATIENT, Run, Setup, about};

/// An enrolment as it should be.
fn enrolment(token: &JoinToken) -> Vec<u8> {
    let request = Request::new().unwrap();
    wire::encode(&Enroll { secret: secret(token), request: request.der().to_vec() }).unwrap()
}

fn hello() -> Vec<u8> {
    wire::encode(&FromWorker::Hello(about())).unwrap()
}

#[test]
fn control_without_a_certificate_is_refused() {
    let run = Run::training();
    let reason = run.runtime.block_on(async {
        let peer = Peer::dial(&run.token, anonymous(&run.token, CONTROL_ALPN)).await.unwrap();
        peer.ask(&hello()).await.closed()
    });
    assert!(reason.contains("no worker's certificate: enrol with the join token first"), "{reason}");
    run.expect_refusal(&["127.0.0.1", "no worker's certificate"]);
    run.finish();
}

#[test]
fn another_runs_certificate_is_refused_in_the_handshake() {
    let run = Run::training();
    let others = Authority::new("another run").unwrap();
    let request = Request::new().unwrap();
    let signed = others.sign(WorkerId(0), request.der()).unwrap();
    // It believes this run's coordinator, but has only the other run's certificate to show.
    let identity = request.into_identity(WorkerId(0), signed, authority(&run.token));
    let refused = run.runtime.block_on(async {
        match Peer::dial(&run.token, member(&identity)).await {
            // In TLS 1.3 the caller is done before its certificate is judged.
            Ok(peer) => peer.ask(&hello()).await.closed(),
            Err(error) => error.to_string(),
        }
    });
    assert!(refused.contains("invalid peer certificate"), "{refused}");
    run.expect_refusal(&["127.0.0.1", "handshake", "certificate is not of this run"]);
    run.finish();
}

#[test]
fn a_wrong_secret_is_refused() {
    let run = Run::gathering(Setup::default());
    for wrong in ["", "00", &"00".repeat(32), &"ff".repeat(4096)] {
        let refused = Client::enroll(&with_field(&run.token, "secret", wrong), LONG).unwrap_err();
        assert!(
            matches!(&refused, JoinError::Refused(reason) if reason.contains("not this run's")),
            "{refused}"
        );
        assert!(refused.to_string().contains("copy the file"), "it says what to do: {refused}");
    }
    run.expect_refusal(&["127.0.0.1", "the join token is not this run's"]);
    run.trained().finish();
}

#[test]
fn a_token_is_worth_nothing_after_its_time() {
    let run = Run::gathering(Setup { token_lifetime: Duration::from_secs(8), ..Setup::default() }).trained();
    let refused = loop {
        match Client::enroll(&run.token, LONG) {
            Ok(_) => std::thread::sleep(Duration::from_millis(500)),
            Err(refused) => break refused,
        }
    };
    assert!(matches!(&refused, JoinError::Refused(reason) if reason.contains("expired")), "{refused}");
    assert!(refused.to_string().contains("--resume"), "it says what to do: {refused}");
    run.expect_refusal(&["the join token has expired"]);
    // Who has joined in time stays.
    run.finish();
}

/// What is sent where an enrolment or a hello should be, and what the refusal must say.
fn broken(message: &[u8]) -> Vec<(Vec<u8>, &'static str)> {
    let with = |range: std::ops::Range<usize>, bytes: &[u8]| {
        let mut broken = message.to_vec();
        broken[range].copy_from_slice(bytes);
        broken
    };
    let too_long = (MESSAGE_BYTES_MAX as u32 + 1).to_le_bytes();
    let shorter = (message.len() - HEADER_BYTES - 16) as u32;
    vec![
        (with(0..2, b"GE"), "does not speak Mattock's control protocol"),
        (with(2..4, &[9, 0]), "version 9 of the control protocol, this program version 3: use one binary"),
        (with(4..8, &too_long), "over the limit of 1048576"),
        (with(4..8, &u32::MAX.to_le_bytes()), "4294967295 bytes is over the limit"),
        (with(4..8, &shorter.to_le_bytes()), "is damaged"),
        (with(4..8, &[0; 4]), "0 bytes is damaged"),
        (message[..5].to_vec(), "cut off: 5 of 8 bytes"),
        (message[..HEADER_BYTES].to_vec(), "cut off: 0 of"),
        (message[..message.len() - 1].to_vec(), "cut off"),
        (vec![], "goodbye"),
    ]
}

#[test]
fn broken_enrolments_are_refused() {
    let mut run = Run::gathering(Setup::default());
    run.add_worker();
    run.expect("the first worker", |event| {
        matches!(event, mattock_coordinator::event::Event::WorkerJoined { .. }).then_some(())
    });
    for (bytes, words) in broken(&enrolment(&run.token)) {
        let reason = run.runtime.block_on(async {
            let peer = Peer::stranger(&run.token).await;
            peer.ask(&bytes).await.closed()
        });
        assert!(reason.contains(words), "{words:?} should be said, not {reason:?}");
        run.expect_refusal(&["127.0.0.1", words]);
    }
    run.trained().finish();
}

#[test]
fn broken_hellos_are_refused() {
    let run = Run::training();
    let identity = certificate(&run.token);
    for (bytes, words) in broken(&hello()) {
        let reason = run.runtime.block_on(async {
            let peer = Peer::with_certificate(&run.token, &identity).await;
            peer.ask(&bytes).await.closed()
        });
        assert!(reason.contains(words), "{words:?} should be said, not {reason:?}");
        run.expect_refusal(&["127.0.0.1", "worker 2", words]);
    }
    run.finish();
}

fn is_whole(message: &[u8]) -> bool {
    let (header, archive) = message.split_at(HEADER_BYTES);
    wire::decode_header(header.try_into().unwrap()) == Ok(archive.len())
        && wire::decode::<FromWorker>(archive).is_ok()
}

/// Every bit of a hello, one at a time: it is refused as damaged, or it is another hello and refused as one that comes
/// too late.
#[test]
fn every_bit_of_a_hello_may_flip() {
    let run = Run::training();
    let message = hello();
    let callers: Vec<Identity> = (0..6).map(|_| certificate(&run.token)).collect();
    let (mut damaged, mut late) = (0, 0);
    let bits: Vec<usize> = (0..8 * message.len()).collect();
    for group in bits.chunks(callers.len()) {
        let calls: Vec<_> = group
            .iter()
            .zip(&callers)
            .map(|(&bit, identity)| {
                let (token, identity, mut flipped) = (run.token.clone(), identity.clone(), message.clone());
                flipped[bit / 8] ^= 1 << (bit % 8);
                run.runtime.spawn(async move {
                    let peer = Peer::with_certificate(&token, &identity).await;
                    // One that is whole need not end, and waits for its answer like any worker.
                    let answer = match is_whole(&flipped) {
                        true => peer.greet(&flipped).await,
                        false => peer.ask(&flipped).await,
                    };
                    (bit, answer)
                })
            })
            .collect();
        for call in calls {
            let (bit, answer) = run.runtime.block_on(call).unwrap();
            match answer {
                Answer::Closed(reason) => {
                    assert!(reason.len() > 10, "bit {bit} is refused without a reason: {reason:?}");
                    damaged += 1;
                }
                Answer::Message(archive) => {
                    let refused = wire::decode::<FromCoordinator>(&archive).unwrap();
                    // A hello that has become a wish for thousands of workers is refused for that.
                    let told =
                        |reason: &str| reason.contains("has its 2 workers") || reason.contains("1 to 2");
                    assert!(
                        matches!(&refused, FromCoordinator::Refused { reason } if told(reason)),
                        "bit {bit}: {refused:?}"
                    );
                    late += 1;
                }
            }
        }
    }
    assert_eq!(damaged + late, bits.len());
    assert!(damaged > 8 * HEADER_BYTES / 2 && late > 0, "{damaged} damaged, {late} late");
    run.expect_refusal(&["is damaged"]);
    run.finish();
}

/// Bits of an enrolment: none of those that flip buys a certificate, where they are header or secret.
#[test]
fn a_sample_of_an_enrolments_bits_may_flip() {
    let run = Run::training();
    let message = enrolment(&run.token);
    let secret = secret(&run.token);
    let at = message.windows(secret.len()).position(|window| window == secret).unwrap();
    let mut dice = Dice(1);
    for round in 0..300 {
        let range = if round % 2 == 0 { at..at + secret.len() } else { 0..message.len() };
        let byte = range.start + dice.below(range.len() as u64) as usize;
        let mut flipped = message.clone();
        flipped[byte] ^= 1 << dice.below(8);
        let answer = run.runtime.block_on(async { Peer::stranger(&run.token).await.ask(&flipped).await });
        match answer {
            Answer::Closed(reason) => assert!(reason.len() > 10, "byte {byte}: {reason:?}"),
            Answer::Message(archive) => match wire::decode::<Enrolled>(&archive).unwrap() {
                Enrolled::Refused { reason } => assert!(reason.len() > 10, "byte {byte}: {reason:?}"),
                Enrolled::Certificate { .. } => {
                    let counts = byte < HEADER_BYTES || (at..at + secret.len()).contains(&byte);
                    assert!(!counts, "byte {byte} counts for nothing");
                }
            },
        }
    }
    run.finish();
}

/// From a message's archive to what is answered.
type Reply = Box<dyn Fn(&[u8]) -> Vec<u8> + Send>;

/// A coordinator that is none, to see what clients make of it.
struct Rogue {
    runtime: Runtime,
    endpoint: Endpoint,
    token: JoinToken,
}

impl Rogue {
    /// Speaks with this configuration where `token` leads from now on.
    fn new(token: &JoinToken, config: ServerConfig) -> Self {
        let runtime = Runtime::new().unwrap();
        let endpoint =
            runtime.block_on(async { Endpoint::server(config, ([127, 0, 0, 1], 0).into()) }).unwrap();
        let address: SocketAddr = endpoint.local_addr().unwrap();
        Self { runtime, endpoint, token: with_field(token, "address", &address.to_string()) }
    }

    /// Answers the first stream of each connection with these bytes, one connection after the other.
    fn answer(&self, answers: Vec<Reply>) {
        let endpoint = self.endpoint.clone();
        self.runtime.spawn(async move {
            for answer in answers {
                let connection = endpoint.accept().await.unwrap().await.unwrap();
                let (mut send, mut receive) = connection.accept_bi().await.unwrap();
                let mut header = [0; HEADER_BYTES];
                receive.read_exact(&mut header).await.unwrap();
                let mut archive = vec![0; wire::decode_header(header).unwrap()];
                receive.read_exact(&mut archive).await.unwrap();
                send.write_all(&answer(&archive)).await.unwrap();
                connection.closed().await;
            }
        });
    }
}

/// A token for an authority of the test's own.
fn token_of(authority: &Authority) -> JoinToken {
    let runtime = Runtime::new().unwrap();
    let model = {
        let _within = runtime.enter();
        Run::gathering(Setup::default()).token
    };
    with_field(&model, "authority", &hex::encode(authority.certificate()))
}

fn in_version_9(mut message: Vec<u8>) -> Vec<u8> {
    message[2] = 9;
    message
}

/// The token's authority is not that of whoever answers: nothing is said to him, the secret least of all.
#[test]
fn a_client_tells_its_secret_to_nobody_but_its_run() {
    let run = Run::training();
    let impostor = Authority::new("wire").unwrap();
    let rogue = Rogue::new(&run.token, server_config(&impostor.coordinator().unwrap(), LONG).unwrap());
    let endpoint = rogue.endpoint.clone();
    let handshake = rogue.runtime.spawn(async move { endpoint.accept().await.unwrap().await.map(|_| ()) });
    let refused = Client::enroll(&rogue.token, LONG).unwrap_err();
    assert!(matches!(refused, JoinError::Unreachable { .. }), "{refused:?}");
    let text = refused.to_string();
    assert!(text.contains("certificate is not of this run") && text.contains("is this its token?"), "{text}");
    let heard = rogue.runtime.block_on(async { timeout(PATIENT, handshake).await.unwrap().unwrap() });
    assert!(heard.is_err(), "without a handshake there is nothing that could carry a secret");
    run.finish();
}

#[test]
fn a_coordinator_of_another_version_is_named_in_enrolment() {
    let authority = Authority::new("wire").unwrap();
    let rogue =
        Rogue::new(&token_of(&authority), server_config(&authority.coordinator().unwrap(), LONG).unwrap());
    let refusal = Enrolled::Refused { reason: "of a later version".to_owned() };
    rogue.answer(vec![Box::new(move |_| in_version_9(wire::encode(&refusal).unwrap()))]);
    let refused = Client::enroll(&rogue.token, LONG).unwrap_err().to_string();
    assert!(refused.contains("version 9") && refused.contains("use one binary"), "{refused}");
}

#[test]
fn a_coordinator_of_another_version_is_named_on_joining() {
    let authority = Authority::new("wire").unwrap();
    let rogue =
        Rogue::new(&token_of(&authority), server_config(&authority.coordinator().unwrap(), LONG).unwrap());
    let enrol = move |archive: &[u8]| {
        let asked = wire::decode::<Enroll>(archive).unwrap();
        let (worker, certificate) = (WorkerId(0), authority.sign(WorkerId(0), &asked.request).unwrap());
        wire::encode(&Enrolled::Certificate { worker, certificate }).unwrap()
    };
    let welcome = |_: &[u8]| in_version_9(wire::encode(&FromCoordinator::Heartbeat).unwrap());
    rogue.answer(vec![Box::new(enrol), Box::new(welcome)]);
    let refused = Client::enroll(&rogue.token, LONG).unwrap().join(about()).unwrap_err().to_string();
    assert!(refused.contains("version 9") && refused.contains("use one binary"), "{refused}");
}

/// Versions that differ in TLS already, in both directions.
#[test]
fn another_protocols_name_is_refused() {
    let run = Run::training();
    for alpn in [control_alpn(4), b"h3".to_vec()] {
        let refused = run.runtime.block_on(Peer::dial(&run.token, anonymous(&run.token, &alpn)));
        let refused = refused.err().unwrap().to_string();
        assert!(refused.contains("known protocol"), "{refused}");
    }
    run.expect_refusal(&["another version of the control protocol", "use one binary"]);

    let authority = Authority::new("wire").unwrap();
    let identity = authority.coordinator().unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![identity.certificate.clone().into()],
            PrivatePkcs8KeyDer::from(identity.key.clone()).into(),
        )
        .unwrap();
    tls.alpn_protocols = vec![[&ENROLL_ALPN[..ENROLL_ALPN.len() - 1], b"4"].concat()];
    let config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
    let rogue = Rogue::new(&token_of(&authority), config);
    let endpoint = rogue.endpoint.clone();
    rogue.runtime.spawn(async move { endpoint.accept().await.unwrap().await.map(|_| ()) });
    let refused = Client::enroll(&rogue.token, LONG).unwrap_err().to_string();
    assert!(refused.contains("another version") && refused.contains("use one binary"), "{refused}");
    run.finish();
}
