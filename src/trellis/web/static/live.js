// The live parts of the pages. Every form and link works without any of this; it makes them immediate.

import { $, bindPage } from "./page.js";
import { bindBlind } from "./blind.js";
import { bindCharts } from "./charts.js";
import { Chat } from "./chat.js";
import { bindStart } from "./chat-start.js";
import { bindKeys, bindLimits } from "./composer.js";
import { bindLoads } from "./loads.js";
import { bindSetup } from "./setup.js";
import { bindUploads } from "./uploads.js";
import { Workbench } from "./workbench.js";

bindPage();
bindLimits();
bindLoads();
bindUploads();
bindSetup();
bindBlind();
bindCharts();
const workbench = $("[data-session]");
if (workbench) new Workbench(workbench);
const room = $("[data-room]");
if (room) new Chat(room);
const beginning = $("[data-chat-start]");
if (beginning) bindStart(beginning);
bindKeys();
