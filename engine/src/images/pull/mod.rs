//! Pulling images from registries (OCI distribution specification). What has come is kept, whole layers as well as the
//! beginning of one, and the next pull goes on from there.

mod credentials;
mod partial;

use std::cell::RefCell;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use picovm_rootfs::image::Limits;

use super::blobs::{Blobs, DOCUMENT_MAX, Digest, check};
use super::content::{self, Kind, Manifest, Named, Platform};
use super::install::ImageActivity;
use super::{Image, ImageName, ImagesError};
use crate::error::EngineError;
use crate::store::Store;
use credentials::credentials;
use partial::Partial;

/// Layers that are fetched at once, as Docker has it.
const AT_ONCE: usize = 3;
/// How often the fetching of a layer is taken up again after it broke off, without anything having come.
const ATTEMPTS: u32 = 5;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Without a single byte.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// How an image is pulled.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// Of an image that is for several platforms, which one.
    pub platform: Platform,
    /// How large an image may be.
    pub limits: Limits,
    /// Whether the registry is asked by HTTP, without TLS. One on this host is asked so if it does not speak TLS.
    pub plain_http: bool,
}

/// What was pulled.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The image.
    pub image: Image,
    /// What the registry has under this name.
    pub digest: Digest,
    /// Whether the name stands for something else now than before.
    pub changed: bool,
}

/// Why an image was not pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry has no such image, or not for us.
    #[error(
        "the registry {registry} has no {name}, or it must not be pulled without other credentials \
         (`docker login` writes them to ~/.docker/config.json)"
    )]
    Denied {
        /// The name.
        name: String,
        /// The registry.
        registry: String,
    },
    /// The registry did not answer as it should.
    #[error("cannot pull {name}: {reason}")]
    Registry {
        /// The name.
        name: String,
        /// What happened.
        reason: String,
    },
    /// The credentials cannot be read.
    #[error("cannot read the credentials for {registry} from {}: {reason}", path.display())]
    Credentials {
        /// The registry.
        registry: String,
        /// The file.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
}

impl Store {
    /// Pulls an image. Content that is there is not fetched again.
    ///
    /// # Errors
    /// [`PullError`] as [`ImagesError::Pull`], [`ImagesError::Content`], [`EngineError::Image`], [`EngineError::Store`].
    pub fn pull_image(
        &self,
        name: &str,
        options: &PullOptions,
        activity: &mut dyn FnMut(ImageActivity),
    ) -> Result<Pulled, EngineError> {
        let name = ImageName::parse(name)?;
        let _adding = self.adding()?;
        let blobs = self.blobs();
        blobs.prepare()?;
        let auth = credentials(name.registry())?;
        // Which one is the process's is of no matter, as there is only one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(EngineError::host("prepare for a pull"))?;
        let (digest, resolved) = runtime.block_on(async {
            let registry = connect(&name, options, auth).await?;
            registry.fetch(&blobs, options, activity).await
        })?;
        // Its threads, if it has made any to look up names, end with it.
        drop(runtime);
        let source = Path::new(&name.whole()).to_owned();
        let mut image = self.install(&digest, &source, &options.limits, activity)?;
        image.registry_digest = Some(resolved.to_string());
        let before = self.read_name(&name.to_string())?;
        let changed = before.is_none_or(|before| before.id() != image.id());
        Ok(Pulled {
            image: self.name_image(&image, &name)?.0,
            digest: resolved,
            changed,
        })
    }
}

/// Whether a registry, given as host and perhaps port, is on this host.
fn is_local(registry: &str) -> bool {
    let host = match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => registry,
    };
    host == "localhost"
        || host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .parse()
            .is_ok_and(|address: IpAddr| address.is_loopback())
}

/// A registry that answers.
struct Registry<'a> {
    client: Client,
    auth: RegistryAuth,
    name: &'a ImageName,
    reference: Reference,
}

/// The name, as the client has it.
fn reference(name: &ImageName) -> Reference {
    let (registry, path) = (name.registry().to_owned(), name.path().to_owned());
    match (name.tag(), name.digest()) {
        (_, Some(digest)) => Reference::with_digest(registry, path, digest.to_owned()),
        (tag, None) => Reference::with_tag(registry, path, tag.unwrap_or_default().to_owned()),
    }
}

async fn connect<'a>(
    name: &'a ImageName,
    options: &PullOptions,
    auth: RegistryAuth,
) -> Result<Registry<'a>, EngineError> {
    let reference = reference(name);
    let host = reference.resolve_registry();
    let protocols: &[ClientProtocol] = match (options.plain_http, is_local(host)) {
        (true, _) => &[ClientProtocol::Http],
        (false, true) => &[ClientProtocol::Https, ClientProtocol::Http],
        (false, false) => &[ClientProtocol::Https],
    };
    let mut failure = None;
    for protocol in protocols {
        let client = Client::try_from(ClientConfig {
            protocol: protocol.clone(),
            platform_resolver: None,
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("picovm/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        })
        .map_err(|error| failed(name, &error))?;
        match client.auth(&reference, &auth, RegistryOperation::Pull).await {
            Ok(_) => {
                return Ok(Registry {
                    client,
                    auth,
                    name,
                    reference,
                });
            }
            // One whose certificate is wrong does speak TLS.
            Err(error @ OciDistributionError::RequestError(_)) if !told(&error).contains("certificate") => {
                // What is said of the first protocol is what its user meant.
                failure.get_or_insert(error);
            }
            Err(error) => return Err(failed(name, &error)),
        }
    }
    Err(failure.map_or_else(
        || broken(name, "it cannot be reached"),
        |error| failed(name, &error),
    ))
}

fn broken(name: &ImageName, reason: impl Into<String>) -> EngineError {
    ImagesError::Pull(PullError::Registry {
        name: name.to_string(),
        reason: reason.into(),
    })
    .into()
}

/// An error of the registry, for people.
fn failed(name: &ImageName, error: &OciDistributionError) -> EngineError {
    let registry = name.registry().to_owned();
    let denied = || {
        ImagesError::Pull(PullError::Denied {
            name: name.to_string(),
            registry: registry.clone(),
        })
        .into()
    };
    match error {
        OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
            denied()
        }
        OciDistributionError::ServerError {
            code: 401 | 403 | 404,
            ..
        } => denied(),
        OciDistributionError::ImageManifestNotFoundError(_) => denied(),
        OciDistributionError::RegistryError { envelope, .. } => {
            let codes: Vec<String> = envelope
                .errors
                .iter()
                .map(|error| format!("{:?}: {}", error.code, error.message))
                .collect();
            let unknown = [
                "ManifestUnknown",
                "NameUnknown",
                "Denied",
                "Unauthorized",
                "NotFound",
            ];
            if codes
                .iter()
                .any(|code| unknown.iter().any(|kind| code.starts_with(kind)))
            {
                denied()
            } else {
                broken(
                    name,
                    format!("the registry {registry} says: {}", codes.join("; ")),
                )
            }
        }
        error => broken(name, told(error)),
    }
}

/// What an error says, and what the layers below it say, each once.
fn told(error: &OciDistributionError) -> String {
    let mut told = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if !told.contains(&text) {
            told = format!("{told}: {text}");
        }
        cause = error.source();
    }
    told
}

impl Registry<'_> {
    /// Fetches manifest, configuration and layers. The result is the manifest's digest, and that of what the name stands for.
    async fn fetch(
        &self,
        blobs: &Blobs,
        options: &PullOptions,
        activity: &mut dyn FnMut(ImageActivity),
    ) -> Result<(Digest, Digest), EngineError> {
        let (resolved, manifest) = self.document(None).await?;
        activity(ImageActivity::Resolved(resolved.clone()));
        let (digest, bytes) = match content::parse(&resolved, &manifest)? {
            Kind::Manifest(_) => (resolved.clone(), manifest),
            Kind::Index(index) => {
                let digest = content::select(&resolved, &index, &options.platform)?;
                self.document(Some(&digest)).await?
            }
        };
        let Kind::Manifest(Manifest { config, layers }) = content::parse(&digest, &bytes)? else {
            return Err(broken(self.name, format!("{digest} is an index in an index")));
        };
        if config.size > DOCUMENT_MAX {
            return Err(broken(
                self.name,
                format!("the configuration {} is too large", config.digest),
            ));
        }
        let activity = RefCell::new(activity);
        stream::iter(std::iter::once(&config).chain(&layers))
            .map(|named| self.content(named, blobs, &activity))
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await?;
        blobs.put(&bytes)?;
        Ok((digest, resolved))
    }

    /// A manifest or index, checked: the one of the name, or another.
    async fn document(&self, digest: Option<&Digest>) -> Result<(Digest, Vec<u8>), EngineError> {
        let reference = match digest {
            Some(digest) => self.reference.clone_with_digest(digest.to_string()),
            None => self.reference.clone(),
        };
        let (bytes, _) = self
            .client
            .pull_manifest_raw(&reference, &self.auth, &ACCEPTED)
            .await
            .map_err(|error| failed(self.name, &error))?;
        let found = Digest::of(&bytes);
        let size = bytes.len() as u64;
        if let Some(expected) = reference.digest().and_then(Digest::parse) {
            check(&found, size, &expected, size)?;
        }
        Ok((found, bytes.to_vec()))
    }

    /// Fetches a configuration or layer, unless it is there.
    async fn content(
        &self,
        named: &Named,
        blobs: &Blobs,
        activity: &RefCell<&mut dyn FnMut(ImageActivity)>,
    ) -> Result<(), EngineError> {
        let tell = |what| (activity.borrow_mut())(what);
        let exists = || blobs.size(&named.digest) == Some(named.size);
        if exists() {
            tell(ImageActivity::Exists(named.digest.clone()));
            return Ok(());
        }
        let Some(mut partial) = Partial::open(blobs, named, &exists)? else {
            tell(ImageActivity::Exists(named.digest.clone()));
            return Ok(());
        };
        let mut attempts = 0;
        loop {
            if partial.done == named.size {
                match partial.check(named) {
                    // What was there before may be from a registry that sent something else.
                    Err(_) if partial.taken_up => partial.restart()?,
                    result => break result?,
                }
            }
            let before = partial.done;
            let result = self.go_on(named, &mut partial, &tell).await;
            let Err(error) = result else { continue };
            attempts = if partial.done > before { 1 } else { attempts + 1 };
            if attempts >= ATTEMPTS || !error.is_passing() {
                partial.sync()?;
                return Err(error.into_engine(self.name));
            }
            tracing::warn!(digest = %named.digest, done = partial.done, "fetching broke off, going on");
            tokio::time::sleep(Duration::from_millis(200 << attempts)).await;
        }
        partial.finish(blobs, named)?;
        tell(ImageActivity::Fetched(named.digest.clone()));
        Ok(())
    }

    /// Fetches what is missing, until the connection ends.
    async fn go_on(
        &self,
        named: &Named,
        partial: &mut Partial,
        tell: &impl Fn(ImageActivity),
    ) -> Result<(), Broken> {
        // From this registry only: addresses that a manifest names elsewhere are anybody's.
        let response = self
            .client
            .pull_blob_stream_partial(&self.reference, named.digest.as_str(), partial.done, None)
            .await
            .map_err(Broken::Registry)?;
        let mut stream = match response {
            BlobResponse::Partial(stream) => stream.stream,
            // From the beginning: this registry cannot do otherwise.
            BlobResponse::Full(stream) => {
                partial.restart().map_err(Broken::Own)?;
                stream.stream
            }
        };
        let before = partial.done;
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(Broken::Stream)?;
            partial.write(&bytes, named).map_err(Broken::Own)?;
            tell(ImageActivity::Fetching {
                digest: named.digest.clone(),
                done: partial.done,
                size: named.size,
            });
        }
        if partial.done == before {
            return Err(Broken::Stream(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }
}

/// Why fetching ended.
enum Broken {
    Registry(OciDistributionError),
    Stream(io::Error),
    Own(EngineError),
}

impl Broken {
    /// Whether it may go better soon.
    fn is_passing(&self) -> bool {
        match self {
            Self::Registry(OciDistributionError::RequestError(_)) | Self::Stream(_) => true,
            Self::Registry(OciDistributionError::ServerError { code, .. }) => *code >= 500 || *code == 429,
            Self::Registry(_) | Self::Own(_) => false,
        }
    }

    fn into_engine(self, name: &ImageName) -> EngineError {
        match self {
            Self::Registry(error) => failed(name, &error),
            Self::Stream(error) => broken(
                name,
                format!("the connection broke off: {error}. The next pull goes on from here"),
            ),
            Self::Own(error) => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_registry_on_this_host_may_do_without_tls() {
        for local in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "127.9.9.9",
            "[::1]:5000",
        ] {
            assert!(is_local(local), "{local}");
        }
        for other in [
            "docker.io",
            "localhost.example.org",
            "10.0.0.1:5000",
            "127.example.org:80",
        ] {
            assert!(!is_local(other), "{other}");
        }
    }
}
