//! The daemon answers as its OpenAPI document says, to requests that schemathesis makes of it.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::guest::{ECHO, run_within};
use crate::images::{Maker, put_image};
use crate::remote::Remote;

/// What is asked for does exist, so that more is tried than how absence is answered. What is
/// changed, removed or copied 256 times does not run. None of them would power off in any time.
const PARAMETERS: &str = r#"
[parameters]
"path.name" = "a"
"path.tag" = "t"

[[operations]]
include-path = "/berth/v1/machines/{name}"
include-method = "DELETE"
parameters = { "path.name" = "removed" }

[[operations]]
include-path = "/berth/v1/machines/{name}"
include-method = "PATCH"
parameters = { "path.name" = "changed" }

[[operations]]
include-path = "/berth/v1/machines/{name}/rename"
parameters = { "path.name" = "renamed" }

[[operations]]
include-path = "/berth/v1/images/{name}"
parameters = { "path.name" = "lab" }

[[operations]]
include-path-regex = "/(stop|restart)$"
parameters = { "query.timeout" = 1 }

[[operations]]
include-path = "/berth/v1/machines/{name}/clone"
parameters = { "path.name" = "cloned" }
"#;
/// What changes the network of the host, does not end by itself, is no HTTP after its beginning, or has a
/// body that is no JSON; each has tests of its own.
const OTHERS: &str = "/networks|/events$|/console$|/agent$|/stats$|/import$|/export$";
const TIME: Duration = Duration::from_secs(600);

#[test]
fn the_daemon_does_what_its_document_says() {
    if Command::new("schemathesis").arg("--version").output().is_err() {
        println!("skipped: no schemathesis here; `pip install schemathesis` gets it");
        return;
    }
    // What is asked for would be made of packages from elsewhere.
    let maker = Maker::new("echo 'E: nothing is made here' >&2\nexit 25\n");
    let remote = Remote::beside(maker);
    put_image(remote.cloud.root(), "lab:1");
    for name in ["a", "removed", "changed", "renamed", "cloned"] {
        remote.cloud.create(name, &ECHO);
    }
    remote.cloud.ok("vm start a");
    remote.cloud.ok("vm snapshot --tag t a");
    let directory = remote.cloud.root().join("schemathesis");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("schemathesis.toml"), PARAMETERS).unwrap();
    let [ca, certificate, key] = remote.files();
    let mut command = Command::new("schemathesis");
    command.current_dir(&directory).arg("run");
    command.arg(format!("https://{}/berth/v1/openapi.json", remote.address));
    command.arg("--tls-verify").arg(ca);
    command.arg("--request-cert").arg(certificate).arg("--request-cert-key").arg(key);
    command.args(["--exclude-path-regex", OTHERS]);
    // A request may be well formed and yet name what this host does not have.
    command.args(["--exclude-checks", "positive_data_acceptance"]);
    command.args(["--max-examples", "15", "--seed", "20261122", "--generation-deterministic"]);
    // A connection that was idle may end just when it is used again.
    command.args(["--request-retries", "2"]);
    command.args(["--request-timeout", "60", "--continue-on-failure", "--warnings", "off"]);
    let ran = run_within(&mut command, b"", TIME);
    assert_eq!(ran.status, Some(0), "{}\n{}", ran.text(), ran.stderr);
    assert!(ran.text().contains(" generated, "), "{}", ran.text());
    // It is as well as before.
    remote.cloud.ok("vm ls");
    remote.cloud.ok("vm restart --time 0 a");
    remote.cloud.console("a").exchange(b"a", b"b");
}
