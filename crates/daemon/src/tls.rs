//! TLS with certificates on both sides, from files.
//!
//! One authority signs for both: a daemon takes clients whose certificates it signed, a client takes a
//! daemon whose certificate it signed for the name in the address. Certificates say themselves, by
//! their extended key usage, if they are for one side only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};

/// Certificates in one file. A chain has three or four; a file of thousands is another one.
const CERTIFICATES_MAX: usize = 256;

/// What one side shows, and what it asks of the other. PEM, all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificates of the authorities that the other side's must come from.
    pub ca: PathBuf,
    /// This side's certificate, and those between it and the authority.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Why there can be no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file does not hold it.
    #[error("cannot read {what} from {}", path.display())]
    File {
        /// What it should hold.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// A file holds none, or far too many.
    #[error("{} has {count} certificates in PEM; 1 to {CERTIFICATES_MAX} are possible", path.display())]
    Count {
        /// Which.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// An authority cannot be used.
    #[error("{} holds no certificate of an authority", path.display())]
    Authority {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// Clients cannot be checked.
    #[error("clients cannot be checked by {}", path.display())]
    Verifier {
        /// The authorities.
        path: PathBuf,
        /// Why.
        source: VerifierBuilderError,
    },
    /// They do not fit together.
    #[error("the certificate {} cannot be used with the key {}", cert.display(), key.display())]
    Pair {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The processor or the build lacks something.
    #[error("TLS cannot be used here")]
    Unusable(#[source] rustls::Error),
}

impl TlsFiles {
    /// For a daemon: clients need a certificate.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(self.authorities()?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let verifier = verifier
            .build()
            .map_err(|source| TlsError::Verifier { path: self.ca.clone(), source })?;
        let builder = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Unusable)?;
        let (chain, key) = self.own()?;
        let config = builder
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|source| self.pair(source))?;
        Ok(Arc::new(config))
    }

    /// For a client.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn client(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Unusable)?;
        let (chain, key) = self.own()?;
        let config = builder
            .with_root_certificates(self.authorities()?)
            .with_client_auth_cert(chain, key)
            .map_err(|source| self.pair(source))?;
        Ok(Arc::new(config))
    }

    fn pair(&self, source: rustls::Error) -> TlsError {
        TlsError::Pair { cert: self.cert.clone(), key: self.key.clone(), source }
    }

    fn own(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|source| TlsError::File {
            what: "a private key",
            path: self.key.clone(),
            source,
        })?;
        Ok((certificates(&self.cert)?, key))
    }

    fn authorities(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca)? {
            roots
                .add(certificate)
                .map_err(|source| TlsError::Authority { path: self.ca.clone(), source })?;
        }
        Ok(roots)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::File { what: "certificates", path: path.to_owned(), source };
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(failed)?.take(CERTIFICATES_MAX + 1).collect();
    let found = found.map_err(failed)?;
    match found.len() {
        1..=CERTIFICATES_MAX => Ok(found),
        count => Err(TlsError::Count { path: path.to_owned(), count }),
    }
}
