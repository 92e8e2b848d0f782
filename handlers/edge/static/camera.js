// A picture from the camera: in the page where the browser allows it (https or this machine), else by the phone's own.

export function connectCamera({ button, capture, take }) {
  const dialog = document.getElementById("camera-dialog");
  const video = document.getElementById("video");
  const error = document.getElementById("camera-error");
  let facing = "environment";

  async function start() {
    stop();
    error.textContent = "";
    try {
      const wanted = { facingMode: facing, width: { ideal: 1920 }, height: { ideal: 1080 } };
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted });
      if (!dialog.open) stop();
    } catch (reason) {
      error.textContent =
        reason.name === "NotAllowedError" ? "The browser does not allow the camera here." : "No camera was found.";
    }
  }

  function stop() {
    video.srcObject?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  }

  button.addEventListener("click", () => {
    if (!navigator.mediaDevices?.getUserMedia) {
      capture.click();
      return;
    }
    dialog.showModal();
    start();
  });
  document.getElementById("camera-close").addEventListener("click", () => dialog.close());
  document.getElementById("flip").addEventListener("click", () => {
    facing = facing === "environment" ? "user" : "environment";
    start();
  });
  document.getElementById("shoot").addEventListener("click", () => {
    if (!video.videoWidth) return;
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((picture) => take(picture, "camera.jpg"), "image/jpeg", 0.92);
    dialog.close();
  });
  dialog.addEventListener("close", stop);
}
