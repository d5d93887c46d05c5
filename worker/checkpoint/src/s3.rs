//! An S3 client from the environment's variables, as other tools of the field read them.
//!
//! `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT` (or
//! `AWS_ENDPOINT_URL`, `AWS_ENDPOINT_URL_S3`), `AWS_VIRTUAL_HOSTED_STYLE_REQUEST`, web identity and instance roles:
//! whatever `object_store` knows. Requests are path style unless told otherwise. Plain HTTP is used only where the
//! endpoint says `http://`.
//!
//! Deliberately absent: `~/.aws` and its profiles.

use std::ffi::OsString;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::{BackoffConfig, ClientOptions, Result, RetryConfig};

use crate::location::Patience;

/// A client of one bucket.
pub(crate) fn client(
    bucket: &str,
    vars: impl Iterator<Item = (OsString, OsString)>,
    patience: Patience,
) -> Result<AmazonS3> {
    // Two rustls providers may be linked, and then none is the default: reqwest would panic. Fails if one is set.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder =
        AmazonS3Builder::new().with_client_options(ClientOptions::new().with_timeout(patience.per_try()));
    for (key, value) in aws_settings(vars) {
        builder = builder.with_config(key, value);
    }
    let endpoint = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint]
        .iter()
        .find_map(|key| builder.get_config_value(key));
    if endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")) {
        builder = plain_http(builder);
    }
    builder.with_bucket_name(bucket).with_retry(retry(patience)).build()
}

/// Variables that mean something to the client.
fn aws_settings(
    vars: impl Iterator<Item = (OsString, OsString)>,
) -> impl Iterator<Item = (AmazonS3ConfigKey, String)> {
    let text = vars.filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)));
    text.filter(|(key, value)| key.starts_with("AWS_") && !value.is_empty())
        .filter_map(|(key, value)| Some((key.to_ascii_lowercase().parse().ok()?, value)))
}

/// Where nothing is encrypted no certificate is needed, and a bare container has none.
fn plain_http(builder: AmazonS3Builder) -> AmazonS3Builder {
    use object_store::ClientConfigKey::{AllowHttp, NoSystemCertificates};
    builder
        .with_config(AmazonS3ConfigKey::Client(AllowHttp), "true")
        .with_config(AmazonS3ConfigKey::Client(NoSystemCertificates), "true")
}

fn retry(patience: Patience) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig::default(),
        max_retries: patience.tries(),
        retry_timeout: patience.per_request(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;
    use crate::Location;
    use crate::blocking::block_on;
    use crate::store::Store;
    use crate::store_error::{Reason, StoreError};

    fn build(vars: &[(&str, &str)]) -> Result<AmazonS3> {
        client("ckpt", vars.iter().map(|(key, value)| (key.into(), value.into())), Patience::Short)
    }

    const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];

    #[test]
    fn an_https_client_can_be_made_with_the_ring_provider() {
        build(&KEYS).unwrap();
    }

    #[test]
    fn half_a_pair_of_keys_is_an_error() {
        assert!(build(&KEYS[..1]).unwrap_err().to_string().contains("SecretAccessKey"));
    }

    /// What a put to a server at that endpoint ends with.
    fn put_to(name: &str, endpoint: &str) -> StoreError {
        let client = build(&[KEYS[0], KEYS[1], (name, endpoint)]).unwrap();
        let store =
            Store::new(std::sync::Arc::new(client), "run".into(), Location::parse("s3://ckpt/run").unwrap());
        block_on(async || store.put("x", "y".into()).await).unwrap_err()
    }

    /// A server that gives every request the same answer.
    fn server_that_answers(status: &'static str, body: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                let _ = connection.read(&mut [0; 8192]);
                let length = body.len();
                let _ = write!(
                    connection,
                    "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                );
            }
        });
        url
    }

    #[test]
    fn an_endpoint_is_taken_by_any_of_its_names() {
        for name in ["AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"] {
            let error = put_to(name, &server_that_answers("403 Forbidden", ""));
            assert_eq!(error.reason, Reason::Denied, "{error}");
        }
    }

    #[test]
    fn a_refusal_says_what_the_server_said_and_what_to_check() {
        let body = "<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message></Error>";
        let error = put_to("AWS_ENDPOINT", &server_that_answers("403 Forbidden", body));
        assert_eq!(
            error.to_string(),
            "could not write s3://ckpt/run/x: InvalidAccessKeyId: No such key.; check AWS_ACCESS_KEY_ID, \
             AWS_SECRET_ACCESS_KEY, AWS_REGION and the bucket's policy"
        );
    }

    #[test]
    fn a_bucket_that_does_not_exist_is_told_from_a_refusal() {
        let body = "<Error><Code>NoSuchBucket</Code></Error>";
        let error = put_to("AWS_ENDPOINT", &server_that_answers("404 Not Found", body));
        assert!(error.is_missing() && error.to_string().contains("create the bucket"), "{error}");
    }

    #[test]
    fn what_the_server_holds_for_wrong_is_not_repeated_and_what_it_cannot_do_now_is() {
        for (status, reason) in [
            ("400 Bad Request", Reason::Refused),
            ("411 Length Required", Reason::Refused),
            ("429 Too Many Requests", Reason::Other),
            ("503 Slow Down", Reason::Other),
        ] {
            let error = put_to("AWS_ENDPOINT", &server_that_answers(status, ""));
            assert_eq!((error.reason, error.is_transient()), (reason, reason == Reason::Other), "{error}");
        }
    }

    #[test]
    fn an_endpoint_where_nobody_listens_is_unreachable() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for scheme in ["http", "https"] {
            let error = put_to("AWS_ENDPOINT", &format!("{scheme}://{free}"));
            assert_eq!(error.reason, Reason::Unreachable, "{error}");
            assert!(error.to_string().contains("check AWS_ENDPOINT"), "{error}");
        }
    }
}
