//! `berth vm cp` and the environment, with Debian guests.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use crate::guest::{Debian, Ran, run};
use crate::kept::Cloud;

struct Box {
    cloud: Cloud,
    _debian: Debian,
}

impl Box {
    fn new(options: &[&str]) -> Option<Self> {
        let debian = Debian::take()?;
        let cloud = debian.cloud();
        let mut create = cloud.command("vm create --net none");
        run(create.args(options).args(["box", "debian:bookworm"]), b"").check(0);
        cloud.ok("vm start box");
        Some(Self { cloud, _debian: debian })
    }

    fn vm(&self, words: &[&str], stdin: &[u8]) -> Ran {
        let mut command = self.cloud.command("vm");
        run(command.args(words).current_dir(self.cloud.root()), stdin)
    }

    fn cp(&self, words: &[&str]) {
        let ran = self.vm(&[&["cp"], words].concat(), b"");
        ran.check(0);
        assert_eq!((ran.text().as_str(), ran.stderr.as_str()), ("", ""), "{words:?}");
    }

    fn fails(&self, words: &[&str], parts: &[&str]) {
        self.vm(&[&["cp"], words].concat(), b"").check_failed(parts);
    }

    fn shell(&self, script: &str) -> String {
        let ran = self.vm(&["exec", "box", "sh", "-c", script], b"");
        ran.check(0);
        ran.text()
    }
}

fn tree(at: &Path) {
    fs::create_dir_all(at.join("sub/empty")).unwrap();
    fs::write(at.join("sub/file"), "content\n").unwrap();
    fs::set_permissions(at.join("sub/file"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::write(at.join("run"), "#!/bin/sh\necho it runs\n").unwrap();
    fs::set_permissions(at.join("run"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("sub/file", at.join("link")).unwrap();
    let data: Vec<u8> = (0..2_000_000u32).map(|i| (i.wrapping_mul(i) >> 9) as u8).collect();
    fs::write(at.join("data"), data).unwrap();
    let then = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_234_567_890);
    fs::File::open(at.join("sub/file")).unwrap().set_modified(then).unwrap();
}

#[test]
fn files_are_copied_both_ways() {
    let Some(machine) = Box::new(&[]) else { return };
    let root = machine.cloud.root();
    tree(&root.join("tree"));
    machine.cp(&["tree", "box:/srv"]);
    let listed =
        machine.shell("cd /srv/tree && ./run && stat -c '%n %a %u %Y' sub/file && readlink link");
    assert_eq!(listed, "it runs\nsub/file 640 0 1234567890\nsub/file\n");
    machine.cp(&["tree/.", "box:/srv/new"]);
    assert_eq!(machine.shell("cat /srv/new/sub/file; ls /srv/new/sub"), "content\nempty\nfile\n");
    machine.cp(&["tree/run", "box:usr/local/bin/again"]);
    assert_eq!(machine.shell("again"), "it runs\n");
    machine.cp(&["box:/srv/tree", "back"]);
    machine.cp(&["box:/srv/tree", "back"]);
    for at in ["back", "back/tree"].map(|name| root.join(name)) {
        assert_eq!(fs::read_to_string(at.join("link")).unwrap(), "content\n");
        let meta = fs::metadata(at.join("sub/file")).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.mtime()), (0o640, 1_234_567_890));
        assert!(fs::read(at.join("data")).unwrap() == fs::read(root.join("tree/data")).unwrap());
        assert!(at.join("sub/empty").is_dir() && at.join("link").is_symlink());
    }
    // Owners with -a: there always, here if we may.
    machine.shell("chown -R 33:44 /srv/tree/sub && chmod 4755 /srv/tree/run");
    machine.cp(&["-a", "box:/srv/tree", "owned"]);
    machine.cp(&["box:/srv/tree", "mine"]);
    let us = rustix::process::geteuid();
    let meta = |name: &str| fs::metadata(root.join(name)).unwrap();
    let expected = if us.is_root() { 33 } else { us.as_raw() };
    assert_eq!(meta("owned/sub/file").uid(), expected);
    assert_eq!(meta("mine/sub/file").uid(), us.as_raw());
    assert_eq!(meta("mine/run").mode() & 0o7777, 0o755, "nothing runs as its owner by a copy");
    if us.is_root() {
        machine.cp(&["-a", "owned", "box:/srv"]);
        assert_eq!(machine.shell("stat -c '%u %g' /srv/owned/sub"), "33 44\n");
    }
    // Streams.
    let stream = machine.vm(&["cp", "box:/srv/tree/sub", "-"], b"");
    stream.check(0);
    let mut tar = std::process::Command::new("tar");
    let listed = run(tar.arg("-t"), &stream.stdout).text();
    assert_eq!(listed, "sub/\nsub/empty/\nsub/file\n");
    machine.vm(&["cp", "-", "box:/tmp"], &stream.stdout).check(0);
    assert_eq!(machine.shell("cat /tmp/sub/file"), "content\n");
}

#[test]
fn copies_that_cannot_be_say_why() {
    let Some(machine) = Box::new(&[]) else { return };
    let root = machine.cloud.root();
    fs::write(root.join("file"), "x").unwrap();
    machine.fails(&["box:/no/such", "."], &["box: ", "/no/such", "No such file"]);
    machine.fails(&["nothing", "box:/"], &["nothing", "No such file"]);
    machine.fails(&["file", "box:/no/such/place"], &["box: ", "/no/such"]);
    machine.fails(&["file", "box:/no/"], &["/no/", "no directory"]);
    machine.fails(&["box:/etc", "file"], &["file", "no directory"]);
    machine.fails(&["file", "nobody:/"], &["no machine nobody"]);
    machine.fails(&["box:/dev/null", "null"], &["empty"]);
    machine.vm(&["cp", "file", "other"], b"").check(2);
    machine.vm(&["cp", "-", "box:/tmp"], b"rubbish").check(1);
    machine.vm(&["cp", "-", "box:/etc/hostname"], b"").check_failed(&["/etc/hostname"]);
    machine.shell("mkfifo /srv/pipe; echo f > /srv/f");
    let ran = machine.vm(&["cp", "box:/srv", "some"], b"");
    ran.check(0);
    assert!(ran.stderr.contains("/srv/pipe a pipe"), "{}", ran.stderr);
    assert_eq!(fs::read_to_string(root.join("some/f")).unwrap(), "f\n");
    // Links that the guest made are not followed, and neither are ours.
    machine.shell("mkdir /srv/evil; ln -s /tmp /srv/evil/out; ln -s ../../.. /srv/evil/up");
    machine.cp(&["box:/srv/evil", "evil"]);
    machine.shell("rm /srv/evil/out; mkdir /srv/evil/out; echo bad > /srv/evil/out/berth-escaped");
    machine.fails(&["box:/srv/evil/.", "evil"], &["evil/out", "no directory"]);
    assert!(!Path::new("/tmp/berth-escaped").exists());
    machine.cloud.ok("vm pause box");
    machine.fails(&["file", "box:/"], &["box is paused"]);
    machine.cloud.ok("vm unpause box");
}

#[test]
fn the_environment_is_what_was_given() {
    let options = ["-e", "GREETING=hello  \"world\" %41", "--env", "PATH=/opt:/usr/bin:/bin"];
    let Some(machine) = Box::new(&options) else { return };
    let shown = machine.shell("printf '%s|%s' \"$GREETING\" \"$PATH\"");
    assert_eq!(shown, "hello  \"world\" %41|/opt:/usr/bin:/bin");
    let mut over = machine.cloud.command("vm exec -e GREETING=bye box printenv GREETING");
    assert_eq!(run(&mut over, b"").text(), "bye\n");
    // The shell on the console has it too.
    let mut console = machine.cloud.console("box");
    use std::io::Write;
    console.to.write_all(b"\necho con-${GREETING%% *}-sole\n").unwrap();
    console.expect(b"con-hello-sole");
    machine.cloud.run("vm set --unset-env PATH --env GREETING=changed box").check(0);
    machine.cloud.ok("vm restart box");
    assert!(machine.shell("echo $GREETING $PATH").starts_with("changed /usr/local/sbin:"));
}
