//! Credentials for a registry, as `docker login` has written them.

use std::path::{Path, PathBuf};

use oci_client::secrets::RegistryAuth;

use super::super::ImagesError;
use super::PullError;
use crate::error::EngineError;

/// Where `docker login` puts credentials.
fn credentials_file() -> Option<PathBuf> {
    let directory = match std::env::var_os("DOCKER_CONFIG") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(&std::env::var_os("HOME")?).join(".docker"),
    };
    Some(directory.join("config.json")).filter(|path| path.is_file())
}

/// What Docker would show this registry.
pub(super) fn credentials(registry: &str) -> Result<RegistryAuth, EngineError> {
    use docker_credential::{CredentialRetrievalError as Failure, DockerCredential};
    let Some(path) = credentials_file() else {
        return Ok(RegistryAuth::Anonymous);
    };
    let server = match registry {
        "docker.io" => "https://index.docker.io/v1/",
        registry => registry,
    };
    let reason = match docker_credential::get_credential(server) {
        Ok(DockerCredential::UsernamePassword(user, password)) => {
            return Ok(RegistryAuth::Basic(user, password));
        }
        Ok(DockerCredential::IdentityToken(token)) => return Ok(RegistryAuth::Bearer(token)),
        Err(Failure::NoCredentialConfigured | Failure::ConfigNotFound) => return Ok(RegistryAuth::Anonymous),
        // As helpers say it that have none.
        Err(Failure::HelperFailure { stdout, .. }) if stdout.contains("credentials not found") => {
            return Ok(RegistryAuth::Anonymous);
        }
        Err(Failure::ConfigReadError) => "it is not as Docker writes it".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(ImagesError::Pull(PullError::Credentials {
        registry: registry.to_owned(),
        path,
        reason,
    })
    .into())
}
