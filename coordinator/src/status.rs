//! What a run is at, as JSON over HTTP on loopback. Read-only: nothing that comes in here reaches membership.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

/// Readers at once.
const READERS_MAX: usize = 16;
/// For a whole request.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// What a run is at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Status {
    pub(crate) run: String,
    pub(crate) phase: &'static str,
    pub(crate) generation: u64,
    pub(crate) world_size: usize,
    pub(crate) step: u64,
    pub(crate) steps: u64,
    /// (id, seconds since it was heard of).
    pub(crate) workers: Vec<(u64, f64)>,
}

impl Status {
    pub(crate) fn new(run: &str) -> Self {
        let (generation, world_size, step, steps) = (0, 0, 0, 0);
        Self {
            run: run.to_owned(),
            phase: "gathering",
            generation,
            world_size,
            step,
            steps,
            workers: Vec::new(),
        }
    }
}

/// Serves the newest status on a free port of 127.0.0.1, for as long as the runtime lives.
pub(crate) async fn serve(status: watch::Receiver<Status>) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let readers = Arc::new(Semaphore::new(READERS_MAX));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(reader) = Arc::clone(&readers).try_acquire_owned() else { continue };
            let status = status.clone();
            tokio::spawn(async move {
                let answer =
                    service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&request, &status))));
                let mut http = http1::Builder::new();
                http.keep_alive(false).timer(TokioTimer::new());
                // A reader that misbehaves hurts only itself.
                let _ = timeout(REQUEST_LIMIT, http.serve_connection(TokioIo::new(stream), answer)).await;
                drop(reader);
            });
        }
    });
    Ok(address)
}

fn answer(request: &Request<Incoming>, status: &watch::Receiver<Status>) -> Response<Full<Bytes>> {
    let (code, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/" | "/status") => {
            (StatusCode::OK, serde_json::to_string(&*status.borrow()).unwrap_or_default() + "\n")
        }
        _ => (StatusCode::NOT_FOUND, "only GET /status is here\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    response
}
