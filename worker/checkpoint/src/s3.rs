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
    use super::*;

    fn build(vars: &[(&str, &str)]) -> Result<AmazonS3> {
        client("ckpt", vars.iter().map(|(key, value)| (key.into(), value.into())), Patience::Short)
    }

    #[test]
    fn an_https_client_can_be_made_with_the_ring_provider() {
        build(&[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")]).unwrap();
    }

    #[test]
    fn an_endpoint_of_either_scheme_and_any_of_its_names_is_taken() {
        for name in ["AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"] {
            for url in ["http://127.0.0.1:1", "https://127.0.0.1:1"] {
                build(&[(name, url), ("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")]).unwrap();
            }
        }
    }

    #[test]
    fn half_a_pair_of_keys_is_an_error() {
        assert!(build(&[("AWS_ACCESS_KEY_ID", "a")]).unwrap_err().to_string().contains("SecretAccessKey"));
    }
}
